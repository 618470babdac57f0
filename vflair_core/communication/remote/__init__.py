"""A channel between machines: the model party's server, and the data party's channel to it, over gRPC."""
