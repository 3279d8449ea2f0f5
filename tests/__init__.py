"""Tests by what they need: `make test-unit` runs the first folder, `make test` runs all of them.

unit        functions and objects: no model, no server, no other process
simulation  error rates of gates, guards and choices over thousands of simulated requests
exactness   what the serving functions emit, by enumeration; compiles them
engine      the real engine on tiny models
training    losses, training and recipes on tiny models
lab         the lab: its arithmetic, and its commands on tiny models
contract    one suite for every implementation of an interface, with real databases and Redis
loop        a training cycle with its worker process
e2e         the service over HTTP, in this process or as `slipstream up` starts it
gpu         a GPU, skipped where there is none
"""
