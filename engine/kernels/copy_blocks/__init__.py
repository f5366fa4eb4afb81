"""Copies of whole KV blocks, for requests that go on differently in the middle of one."""
