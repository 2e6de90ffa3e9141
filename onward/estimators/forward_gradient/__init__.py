"""Forward gradients: guess directions, scaled by derivatives of a target along them."""

from onward.estimators.forward_gradient.estimator import ForwardGradient

__all__ = ["ForwardGradient"]
