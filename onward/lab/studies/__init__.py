"""Commands that put several trainings, or steps of training, side by side."""
