"""Gradient estimators, one idea a file."""

from onward.estimators.backprop import Backprop
from onward.estimators.base import Estimator, Step
from onward.estimators.feedback import DFA, DKP, FDFA
from onward.estimators.forward_gradient.estimator import ForwardGradient
from onward.estimators.local import LocalLoss

__all__ = ["DFA", "DKP", "FDFA", "Backprop", "Estimator", "ForwardGradient", "LocalLoss", "Step"]
