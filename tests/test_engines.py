"""Real workers: what they send arrives once, and nobody's death, pause or garbage stops the rest.

Numbers in brackets are those of the list of tests that a right implementation must pass.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.experiment import Record
from coursekit.parallelism import (
    asgd,
    backup_workers,
    group_asynchronous,
    launch,
    simulate,
    ssgd,
)
from coursekit.parallelism.engines import links, processes, serve

pytestmark = pytest.mark.timeout(280)
HERE = Path(__file__).resolve().parent
X, Y, X_TEST, Y_TEST = data.load("digits").tensors("cpu", torch.float64)
SETTINGS = {"rule": asgd, "workers": 3, "lr": 0.1, "batch_size": 16}
REFUSALS = [f"refused_{why}" for why in ("nonfinite", "duplicate", "version", "epoch", "unknown")]


def net():
    return models.mlp([64, 16, 10], generator=train.generator(0, "init")).double()


def slow_loss(path, output, target):
    """Take 10 ms, and leave a mark: a count of gradients that no process can lose."""
    time.sleep(0.01)
    with open(path, "ab") as marks:
        marks.write(b".")
    return cross_entropy(output, target)


def run(folder, updates, x=X, **options):
    """Launch, and return the log and how many gradients were computed by anybody."""
    path = folder / "marks"
    loss = partial(slow_loss, str(path))
    options = SETTINGS | {"samples": 16 * updates, "deadline": 200, "patience": 60} | options
    return launch(net(), loss, x, Y, **options), path.stat().st_size


def distance_to_replay(log, x=X, **options):
    again = simulate(net(), cross_entropy, x, Y, order=log.trace, **(SETTINGS | options))
    assert len(again.rows) == len(log.rows)
    return float((again.server.weights - log.server.weights).abs().max())


def at(version, act):
    """Watch a run and act once, when the server has made that many updates."""
    done = []

    def watch(status):
        if status.version >= version and not done:
            done.append(True)
            act(status.processes)

    return watch


def both(*watchers):
    return lambda status: [watch(status) for watch in watchers]


def send(name, number):
    return lambda workers: os.kill(workers[name].pid, number)


def counted(log):
    """Gradients of which the server knows."""
    kinds = ["accepted", "late", "lost", *REFUSALS]
    return sum(log.server.counts.get(kind, 0) for kind in kinds)


# ---- processes ----


@pytest.fixture(scope="module")
def with_nan(tmp_path_factory):
    """An ordinary run on data in which one example of 1,200 is not a number."""
    x = X.clone()
    x[5, 0] = torch.nan
    return x, *run(tmp_path_factory.mktemp("plain"), 150, x=x)


@pytest.mark.covers("P2")
def test_the_order_of_arrival_replayed_in_the_simulator_gives_the_same_weights(with_nan):
    """[19]"""
    x, log, _ = with_nan
    assert log.server.version == 150
    assert distance_to_replay(log, x, samples=16 * 150) < 1e-12


def test_a_gradient_that_is_not_finite_is_refused_and_training_goes_on(with_nan):
    """[25]"""
    _, log, _ = with_nan
    assert log.server.counts["refused_nonfinite"] >= 1
    assert log.server.weights.isfinite().all()
    assert log.rows[-1].loss < log.rows[0].loss


def test_every_gradient_that_was_computed_is_counted_once(with_nan):
    _, log, computed = with_nan
    assert counted(log) == computed


def test_the_log_has_real_times_from_which_a_simulation_can_start(with_nan):
    _, log, _ = with_nan
    assert (log.column("clock")[1:] >= log.column("clock")[:-1]).all()
    assert set(log.durations()) == {0, 1, 2}
    assert min(min(times) for times in log.durations().values()) >= 10_000_000


def test_workers_that_take_turns_see_the_updates_of_all_others(with_nan):
    """[10]: M − 1 on average, whatever the times."""
    _, log, _ = with_nan
    assert log.mean_staleness(after=15) == pytest.approx(2, abs=0.2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    kill = at(30, send(1, signal.SIGKILL))
    return run(tmp_path_factory.mktemp("killed"), 150, watch=kill)


@pytest.mark.covers("P4")
def test_a_killed_worker_is_let_go_and_the_others_go_on(killed):
    """[22]"""
    log, computed = killed
    assert log.server.version == 150
    assert log.server.workers == {0, 2}
    assert 1 not in log.server.backups
    assert counted(log) in (computed, computed - 1)  # what it had not sent when it died
    (death,) = [event.clock for event in log.events if event.kind == "death"]
    after = sum(row.clock < death for row in log.rows) + 5
    assert log.mean_staleness(after) == pytest.approx(1, abs=0.2)


def test_a_run_with_a_death_can_be_replayed(killed):
    """[19, 22]"""
    assert distance_to_replay(killed[0], samples=16 * 150) < 1e-12


def test_a_worker_that_was_paused_sends_a_gradient_as_stale_as_the_pause_was_long(tmp_path):
    """[23]"""
    pause = both(at(20, send(1, signal.SIGSTOP)), at(100, send(1, signal.SIGCONT)))
    log, computed = run(tmp_path, 200, watch=pause)
    assert log.server.workers == {0, 1, 2}
    late = max(log.rows, key=lambda row: row.staleness)
    assert late.worker == 1
    assert late.staleness > 60
    assert counted(log) == computed


@pytest.mark.covers("P4")
def test_a_worker_silent_for_too_long_is_let_go_and_returns_to_fresh_weights(tmp_path):
    """[24]"""
    # Two workers need 3 s for 600 updates, if they are alone on the machine; else more.
    pause = both(at(20, send(1, signal.SIGSTOP)), at(600, send(1, signal.SIGCONT)))
    log, computed = run(tmp_path, 1000, watch=pause, patience=1.0)
    mine = [event for event in log.events if event.worker == 1]
    left = next(i for i, event in enumerate(mine) if event.kind == "death")
    assert "join" in [event.kind for event in mine[left:]]
    assert log.server.counts["refused_unknown"] >= 1  # the gradient of before
    assert max(row.staleness for row in log.rows if row.worker == 1) < 300
    assert counted(log) == computed


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restarted")
    options = {"checkpoint": folder / "log.pt", "checkpoint_every": 20, "restarts": 1}
    kill = at(70, send("server", signal.SIGKILL))
    return run(folder, 150, watch=kill, **options)


def test_a_killed_server_goes_on_from_its_checkpoint_and_loses_nothing_silently(restarted):
    """[28]"""
    log, computed = restarted
    assert log.server.epoch == 1
    assert log.column("version").tolist() == list(range(1, 151))
    assert log.server.counts["accepted"] == 150
    assert counted(log) == computed


def test_no_gradient_of_before_a_restart_is_applied_after_it(restarted):
    """[28]: else the replay, in which all workers leave and join, would end elsewhere."""
    log, _ = restarted
    assert [event.kind for event in log.events].count("join") == 3
    assert distance_to_replay(log, samples=16 * 150) < 1e-12


def test_a_synchronous_rule_goes_on_without_a_killed_worker(tmp_path):
    """[22]"""
    log, _ = run(tmp_path, 90, rule=ssgd, watch=at(10, send(2, signal.SIGKILL)))
    assert log.server.workers == {0, 1}
    assert log.column("staleness").max() == 0
    assert set(log.column("batch")[-5:]) == {32}
    assert distance_to_replay(log, rule=ssgd, samples=16 * 90) < 1e-12


def broken_loss(output, target):
    raise ArithmeticError("broken on purpose")


def test_the_error_of_a_worker_is_the_error_of_launch(tmp_path):
    settings = SETTINGS | {"samples": 100, "deadline": 100}
    for engine in ("gloo", "threads"):
        with pytest.raises(RuntimeError, match="failed(.|\n)*broken on purpose"):
            launch(net(), broken_loss, X, Y, engine=engine, **settings)


# ---- what no well-behaved worker sends ----


@contextmanager
def serving(folder, samples, like):
    """Serve from a thread of this process; give three lines to it, and its log when it is done."""
    store = processes._host("127.0.0.1", 0)
    address = ("127.0.0.1", store.port)
    settings = dict.fromkeys(serve.Job.__dataclass_fields__) | SETTINGS | {
        "model": like, "loss": cross_entropy, "samples": samples, "workers": 1, "lr": 1.0,
        "checkpoint": folder / "log.pt", "patience": 60.0, "deadline": 100.0,
    }  # fmt: skip
    hub, done = links.GlooHub(address, 0, like, 60.0, 100.0), []
    service = serve.Service(hub, serve.Job(**settings))
    thread = threading.Thread(target=lambda: done.append(service.run()), daemon=True)
    thread.start()
    members = [(0, like), (1, like), (5, torch.zeros(4))]
    lines = [links.GlooLine(address, worker, size, 100) for worker, size in members]
    try:
        yield *lines, lambda: thread.join(100) or done[0]
    finally:
        for line in lines:
            line.close()
        hub.close()


def test_what_may_not_be_applied_is_refused_and_the_server_lives(tmp_path):
    """[24, 25, 26, 27, 28]"""
    like, one = torch.zeros(3), torch.ones(3)
    with serving(tmp_path, 4, like) as (line, joined, longer, result):
        first, _ = line.join()
        first = first._replace(samples=1)
        header, _ = line.exchange(first, one)
        assert header.version == 1
        header, _ = line.exchange(first, one)  # the same push again
        assert header.version == 1
        for wrong in ({"version": 99}, {"epoch": 7}):
            header, _ = line.exchange(header._replace(samples=1, **wrong), one)
        header, weights = line.exchange(header._replace(samples=1), one * torch.nan)
        assert (header.version, weights.tolist()) == (1, [-1.0] * 3)
        with pytest.raises(ValueError, match=r"send: expected .* shape \(3,\), got .* \(4,\)"):
            line.pair.send(header, torch.ones(4))
        with pytest.raises(ValueError, match=r"send: expected torch.float32.*got torch.float64"):
            line.pair.send(header, one.double())
        with pytest.raises(ValueError, match="join: expected a gradient of 3 torch.float32, got 4"):
            longer.join()
        other, fresh = joined.join()
        assert (other.version, fresh.tolist()) == (1, [-1.0] * 3)
        header, _ = line.exchange(header._replace(samples=1), one)
        other, _ = joined.exchange(other._replace(samples=1), one)
        header, _ = line.exchange(header._replace(samples=1), one)
        assert header.version == 4
        assert line.exchange(header, one)[0].stop
        assert joined.exchange(other, one)[0].stop
        log = result()
    assert log.server.weights.tolist() == [-4.0] * 3
    assert log.column("worker").tolist() == [0, 0, 1, 0]
    assert log.column("staleness").tolist() == [0, 0, 1, 1]
    refused = ("duplicate", "version", "epoch", "nonfinite")
    counts = {"accepted": 4, "late": 2} | {f"refused_{why}": 1 for why in refused}
    assert log.server.counts == counts


def test_a_script_skips_the_turns_of_the_dead_and_forgets_what_they_sent_early(tmp_path):
    settings = dict.fromkeys(serve.Job.__dataclass_fields__) | {
        "model": torch.zeros(1), "loss": cross_entropy, "rule": asgd, "workers": 2, "lr": 1.0,
        "samples": 3, "order": [0, 0, 1, 1, 0], "checkpoint": tmp_path / "log.pt",
        "patience": 0.5, "deadline": 20.0,
    }  # fmt: skip
    hub = links.Hub()
    service = serve.Service(hub, serve.Job(**settings))
    boxes = [hub.open(worker, links.Header(worker=worker)) for worker in (0, 1)]

    def put(kind, worker, version=0):
        header = links.Header(worker=worker, version=version, samples=1)
        hub.put(boxes[worker], links.Message(kind, worker, header, torch.ones(1)))

    put("push", 1)  # early: the first two turns are those of 0
    put("push", 0)
    put("gone", 1)
    for version in (1, 2, 3):
        put("push", 0, version)
    log = service.run()
    assert log.column("worker").tolist() == [0, 0, 0]
    assert log.server.counts == {"accepted": 3, "lost": 1, "late": 1}


def test_a_worker_that_dies_while_it_joins_ends_no_thread_with_an_error(monkeypatch):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    monkeypatch.setattr(links, "CONNECT", 1.0)
    store = processes._host("127.0.0.1", 0)
    hub = links.GlooHub(("127.0.0.1", store.port), 0, torch.zeros(3), 60.0, 60.0)
    try:
        store.set("ticket/0/1", "0 0 3 torch.float32")  # and nobody comes to make the pair
        store.add("tickets/0", 1)
        assert store.get("answer/0/1") == b"welcome"
        hub._threads[1].join(30)
        assert not hub._threads[1].is_alive()
        assert errors == []
        assert hub.boxes == {}
    finally:
        hub.close()


def test_the_network_card_is_the_one_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-card")
    with pytest.raises(RuntimeError, match="no-such-card"):
        links.device("192.0.2.1")
    links.device("127.0.0.1")  # the machine itself is reached by its loopback


def test_a_header_keeps_large_integers_and_any_loss():
    header = links.Header(1, 2, 2**53 - 1, 4, 5, 10**15, float("inf"), 0.1, 1)
    assert links.Header.of(header.tensor()) == header


# ---- no process is left, no wait without an end ----


def forever():
    """Train until somebody interrupts; tell the numbers of all processes once all are at work."""
    # A process that was started in the background of a shell ignores interrupts, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def tell(status):
        print(*(process.pid for process in status.processes.values()), flush=True)

    launch(net(), cross_entropy, X, Y, samples=10**9, watch=at(5, tell_of(tell)), **SETTINGS)


def tell_of(tell):
    return lambda workers: tell(processes.Status(0, workers))


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_no_process_is_left_behind(how):
    """[29]"""
    parent = subprocess.Popen(
        [sys.executable, "-c", "import test_engines; test_engines.forever()"],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 4
        parent.send_signal(how)
        parent.wait(60)
    finally:
        parent.kill()
    until = time.monotonic() + 60
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def test_an_interrupt_while_a_process_starts_stays_an_interrupt(monkeypatch):
    begun = []

    def start(process):
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    with pytest.raises(KeyboardInterrupt):
        launch(net(), cross_entropy, X, Y, samples=100, **SETTINGS)
    assert len(begun) == 1


def endless_loss(output, target):
    time.sleep(0.2)
    return cross_entropy(output, target)


def test_a_run_that_does_not_end_is_ended_by_its_deadline():
    """[30]"""
    settings = SETTINGS | {"samples": 10**6, "deadline": 1.0}
    with pytest.raises(TimeoutError, match=r"launch: not done within 1.0 s"):
        launch(net(), endless_loss, X, Y, engine="threads", **settings)


@pytest.mark.covers("P5")
def test_the_stored_benchmark_keeps_its_promises():
    record = Record.load(HERE.parent / "benchmarks" / "results" / "engines.json")
    assert "dirty" not in record.commit
    for size in ("4 KB", "1 MB", "10 MB"):
        echo, server = (median(record.values[f"{who} {size}"]) for who in ("echo", "server"))
        assert server >= 0.8 * echo, size
    found = record.config["staleness"]  # its mean is forced; its spread is predicted
    assert found["measured"]["sd"] == pytest.approx(found["simulated"]["sd"], rel=0.25)


# ---- threads, Ray, torchrun ----


@pytest.mark.parametrize("rule", [asgd, ssgd], ids=["asgd", "ssgd"])
def test_threads_under_a_script_equal_the_simulator(rule):
    """[21]"""
    order = [0, 1, 2, 2, 1, 0] * 10 if rule is ssgd else [0, 0, 1, 2, 1, 1, 0, 2] * 8
    settings = SETTINGS | {"rule": rule, "samples": 16 * len(order), "local_steps": 1}
    log = launch(net(), cross_entropy, X, Y, engine="threads", order=order, **settings)
    again = simulate(net(), cross_entropy, X, Y, order=order, **settings)
    assert log.column("worker").tolist() == again.column("worker").tolist()
    assert log.column("staleness").tolist() == again.column("staleness").tolist()
    torch.testing.assert_close(log.server.weights, again.server.weights, rtol=0, atol=1e-12)


def test_backup_workers_that_are_real_finish_and_what_is_late_is_dropped():
    """They cannot be cancelled: a second answer would be taken for that to the next gradient."""
    rule = partial(backup_workers, spare=1)
    settings = SETTINGS | {"samples": 32 * 60}
    log = launch(net(), cross_entropy, X, Y, engine="threads", **(settings | {"rule": rule}))
    assert log.server.version == 60
    assert not set(log.server.counts) & set(REFUSALS)
    assert "death" not in {event.kind for event in log.events}
    finish = partial(rule, cancel=False)
    assert distance_to_replay(log, rule=finish, samples=32 * 60) < 1e-12


def test_gradients_held_when_the_server_dies_are_lost_and_the_replay_knows(tmp_path):
    """[19, 28]: of a group that was not complete."""
    settings = SETTINGS | {"rule": partial(group_asynchronous, groups=2), "samples": 16 * 40}
    job = serve.Job(**dict.fromkeys(serve.Job.__dataclass_fields__) | settings | {
        "model": net(), "loss": cross_entropy, "x": X, "y": Y, "local_steps": 1, "seed": 0,
        "device": "cpu", "checkpoint": tmp_path / "log.pt", "checkpoint_every": 1,
        "patience": 20.0, "deadline": 20.0,
    })  # fmt: skip
    hub, compute = links.Hub(), serve.computer(job)
    service = serve.Service(hub, job)
    boxes = [hub.open(worker, links.Header(worker=worker)) for worker in range(3)]
    for worker in (0, 1):  # 0 waits for 2; 1 is a group of its own, and its update is saved
        header, slope = compute(worker, links.Header(), job.start())
        hub.put(boxes[worker], links.Message("push", worker, header, slope))
    hub.fail(InterruptedError("the server dies"))
    with pytest.raises(RuntimeError, match="the server dies"):
        service.run()
    log = launch(
        net(), cross_entropy, X, Y, engine="threads", checkpoint=job.checkpoint, **settings
    )
    assert [event.kind for event in log.trace].count("restart") == 1
    assert log.server.counts["lost"] == 1
    assert distance_to_replay(log, **settings) < 1e-12


def test_local_steps_and_evaluations_are_those_of_the_simulator():
    settings = SETTINGS | {"samples": 16 * 2 * 30, "local_steps": 2, "evaluate_every": 320}
    settings |= {"evaluate": largest_weight}
    log = launch(net(), cross_entropy, X, Y, engine="threads", **settings)
    again = simulate(net(), cross_entropy, X, Y, order=log.trace, **settings)
    assert [e["samples"] for e in log.evaluations] == [e["samples"] for e in again.evaluations]
    assert [e["largest"] for e in log.evaluations] == pytest.approx(
        [e["largest"] for e in again.evaluations]
    )


def largest_weight(weights):
    return {"largest": weights.abs().max().item()}


def test_ray_actors_may_die_and_the_run_can_be_replayed(tmp_path, monkeypatch):
    """[19, 22, 24]"""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # where actors find the loss
    kill = at(20, lambda workers: ray.kill(workers[1]))
    log, _ = run(tmp_path, 60, engine="ray", watch=kill, restarts=1)
    assert not ray.is_initialized()
    assert log.server.workers >= {0, 2}  # the third is back, if there was time
    assert [event.kind for event in log.events].count("death") == 1
    assert distance_to_replay(log, samples=16 * 60) < 1e-12


def ray_in_which(**methods):
    """Stand in for Ray on this machine; give it, and whether it was started and stopped."""
    seen = []
    step = SimpleNamespace(remote=lambda *_: object())
    actor = SimpleNamespace(remote=lambda *_: SimpleNamespace(step=step))
    names = {"RayActorError": type("Died", (Exception,), {}),
             "RayTaskError": type("Failed", (Exception,), {})}  # fmt: skip
    plain = {
        "is_initialized": lambda: False, "init": lambda **_: seen.append("init"),
        "shutdown": lambda: seen.append("shutdown"), "put": lambda job: job,
        "remote": lambda kind: actor, "kill": lambda actor: None,
        "wait": lambda pending, timeout: (pending[:1], []), "exceptions": SimpleNamespace(**names),
    }  # fmt: skip
    return SimpleNamespace(**(plain | methods)), seen


def test_a_job_that_ray_cannot_take_leaves_no_cluster(monkeypatch):
    def put(job):
        raise TypeError("cannot pickle")

    ray, seen = ray_in_which(put=put)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(TypeError, match="cannot pickle"):
        launch(net(), cross_entropy, X, Y, engine="ray", samples=100, **SETTINGS)
    assert seen == ["init", "shutdown"]


def test_the_error_of_a_ray_worker_is_the_error_of_launch(monkeypatch):
    def get(result):
        raise ray.exceptions.RayTaskError("broken on purpose")

    ray, seen = ray_in_which(get=get)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(RuntimeError, match="launch: a worker failed: broken on purpose"):
        launch(net(), cross_entropy, X, Y, engine="ray", samples=100, **SETTINGS)
    assert seen == ["init", "shutdown"]


def test_torchrun_starts_a_server_and_workers(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["-m", "coursekit.parallelism.engines", "--samples", "3200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100 updates, mean staleness ")


def test_a_rank_refuses_another_number_of_workers(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"launch: expected workers to be one of 2, got 3"):
        launch(net(), cross_entropy, X, Y, engine="torchrun", samples=10, **SETTINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "mpi"}, r"launch: expected engine to be one of 'gloo', .*, got 'mpi'"),
        ({"workers": 0}, r"launch: expected workers of at least 1, got 0"),
        ({"samples": 0}, r"launch: expected samples of at least 1, got 0"),
        ({"patience": 0.0}, r"launch: expected patience positive and finite, got 0.0"),
        ({"deadline": float("inf")}, r"launch: expected deadline positive and finite, got inf"),
        ({"order": [0], "restarts": 1}, r"launch: expected order or a run that can be restarted"),
        ({"order": [0], "checkpoint": "x"}, r"launch: expected order or a run that can be resta"),
    ],
)
def test_launch_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        launch(net(), cross_entropy, X, Y, **(SETTINGS | {"samples": 16} | options))
