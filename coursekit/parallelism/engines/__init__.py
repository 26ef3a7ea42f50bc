"""Real workers behind one function, `launch`.

``run``        `launch` itself, and workers that are threads
``serve``      what server and worker do, whichever way their packets travel
``links``      how packets travel: pairs of processes joined by gloo, or queues
``processes``  server and workers as processes, watched, started again, never left behind
``on_ray``     workers as Ray actors
"""

from coursekit.parallelism.engines.processes import Status
from coursekit.parallelism.engines.run import launch
