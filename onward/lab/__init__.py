"""The application: data, networks, the training loop, the command."""
