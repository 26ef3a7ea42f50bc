"""coursekit: the package behind the textbook *Efficient Deep Learning, executed*.

Nothing heavy is imported here. Import the room you need::

    from coursekit import autodiff, data, models, train

Shared floor, used by every chapter:

``data``        real data sets, offline by default
``models``      the networks that chapters train
``train``       mini-batches, the training loop, independent random streams
``curvature``   Hessian-vector products, top eigenvalue, trace, gradients of single examples
``experiment``  claims, seeds, records of long studies
``plot``        figures legible in light and dark
``widgets``     interactive figures that work on a static page

Chapter floor, one room a chapter:

``autodiff``    reverse and forward mode on NumPy arrays
``bagging``     bootstrap samples, votes, the error of an average, many nets trained at once
``dcasgd``      gradients that come late, and what corrects or only damps them
``dropout``     random thinned networks, their average, and what it is on a linear model
``generalization``  which minimum training finds, how wide it is, and which step it allows
``gsgd``        rescaling that a network does not feel, its paths, and descent on path values
``initialization``  where training starts, what depth does to a signal, and the theory
``lacim``       distribution shift: LaCIM, six other methods, data of known cause, selection
``normalization``  batch, layer, group, instance and RMS norm; the condition number
``optimizers``  directions of a step, the classes that take it, schedules, Newton's step
``parallelism``  server rules, a simulated cluster, real processes, collectives, compression
``regularization``  penalties, projections, filters, augmentation, early stopping, averages
"""

__version__ = "0.1.0"
