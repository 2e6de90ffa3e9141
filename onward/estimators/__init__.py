"""Gradient estimators, one rule a file; `onward/__init__.py` exports them."""
