"""Kills the processes of a service at random, while streams of known tokens run through it.

streams.py has the clients and compares what they get, strikes.py kills, remains.py looks for what is left
behind, verdict.py counts it all.
"""
