"""Distribution shift: LaCIM, six other methods under one contract, data of known cause, selection.

``model``      `LaCIM`, and its bound `elbo`
``parts``      `DomainPrior`, the decoders `Decoder` and `Paint`, `backbone`
``inference``  `infer_latents`, `latent_gaussian`, `refit_head`, `predictions`, `saliency`
``scm``        `simulate_scm`, `colored_mnist`, `mean_correlation_coefficient`
``baselines``  `ERM`, `IRM`, `DANN`, `MMDAAE`, `DIVA`, `SVAE`, and what they are made of
``selection``  `fit_domains`, `hold_out`, `accuracy`, and `select`, the named rules
``folders``    `load_nico`, `load_adni`, from a folder that the reader obtains
"""

from coursekit.lacim.baselines import (
    DANN,
    DIVA,
    ERM,
    IRM,
    MMDAAE,
    SVAE,
    gaussian_kl,
    irm_penalty,
    mmd,
)
from coursekit.lacim.folders import load_adni, load_nico
from coursekit.lacim.inference import (
    infer_latents,
    latent_gaussian,
    predictions,
    refit_head,
    saliency,
)
from coursekit.lacim.model import LaCIM, elbo
from coursekit.lacim.parts import Decoder, DomainPrior, Paint, backbone
from coursekit.lacim.scm import colored_mnist, mean_correlation_coefficient, simulate_scm
from coursekit.lacim.selection import accuracy, fit_domains, hold_out, select
