"""``python -m coursekit.data list | path | fetch NAME``."""

import argparse
import sys

from coursekit.data import files, sets


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what goes wrong is told in one line, with exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m coursekit.data")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print all data sets, their tiers and licences")
    commands.add_parser("path", help="print the folders where the full tier is looked for")
    fetch = commands.add_parser("fetch", help="download the full tier into the last of them")
    fetch.add_argument("name", choices=[*sets.IMAGES])
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name, info in sets.SETS.items():
            print(f"{name:14} {', '.join(info.tiers):13} {info.task:15} {info.licence}")
    elif options.command == "path":
        print(*files.places(), sep="\n")
    else:
        try:
            print(*files.fetch(options.name), sep="\n")
        except (ImportError, OSError, ValueError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
