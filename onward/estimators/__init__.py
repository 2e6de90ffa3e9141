"""Gradient estimators, one rule a file."""

from onward.estimators.backprop import Backprop
from onward.estimators.base import ALGORITHMS, Estimator, Step
from onward.estimators.dfa import DFA
from onward.estimators.dkp import DKP
from onward.estimators.drtp import DRTP
from onward.estimators.fdfa import FDFA
from onward.estimators.feedback import DirectFeedback, Feedback
from onward.estimators.forward_gradient import ForwardGradient
from onward.estimators.local import LocalLoss
from onward.estimators.settings import AtLeast, OneOf
from onward.estimators.signals import Known, SignalEstimator

__all__ = [
    "ALGORITHMS",
    "DFA",
    "DKP",
    "DRTP",
    "FDFA",
    "AtLeast",
    "Backprop",
    "DirectFeedback",
    "Estimator",
    "Feedback",
    "ForwardGradient",
    "Known",
    "LocalLoss",
    "OneOf",
    "SignalEstimator",
    "Step",
]
