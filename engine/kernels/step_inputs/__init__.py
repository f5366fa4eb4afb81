"""Laying out a step on the device: persistent rows are patched, then read into the model's inputs."""
