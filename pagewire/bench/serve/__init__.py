"""A load generator for any OpenAI-compatible server and for pagewire's own gRPC.

It draws from a seed what is asked (datasets.py, prompts.py) and when (load.py), sends it from one process or
several (share.py, generator.py) through a client of its own that costs little (http_client.py) or grpc.aio
(grpc_client.py), and makes figures of what came back (answer.py, metrics.py, tables.py, picture.py). sweep.py
is the whole.
"""
