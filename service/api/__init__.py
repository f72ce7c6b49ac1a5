"""gRPC services: each translates its messages into sessions and results, and nothing else."""
