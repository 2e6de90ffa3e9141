"""The application: networks, data, the training loop and the commands around the library."""
