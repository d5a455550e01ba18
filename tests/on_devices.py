"""Runs a script on the devices that XLA_FLAGS makes of the CPU; the last line that it prints are facts of its programs.
It fails if a chunk is traced twice: tracing and compiling are most of the time of a short run.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/on_devices.py crl --num_seeds=2 ...
"""

import importlib
import json
import os
import re
import sys

import chex
import jax

from shared import run

FACTS = {}
COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\b")
GATHERED = re.compile(r"= \w+\[([\d,]+)\]\S* all-gather\(")
compile_jitted = run.Run.compile_jitted


def looked_at(self, name, jitted, *shapes):
    program = compile_jitted(self, name, jitted, *shapes)
    places = program.compiled.input_shardings[0][0]
    leaves = [(x.shape, place.shard_shape(x.shape)) for x, place in zip(*map(jax.tree.leaves, (shapes[0], places)))]
    FACTS[name] = {
        "gathered": [[*map(int, dims.split(","))] for dims in GATHERED.findall(program.compiled.as_text())],
        "collectives": sorted(set(COLLECTIVE.findall(program.compiled.as_text()))),
        "reused": program.compiled.memory_analysis().alias_size_in_bytes,
        "shares": leaves,  # of its first argument: shape, and shape of what a device holds
    }
    return program


def only_train(*arguments):
    train(*arguments)
    print(json.dumps(FACTS), flush=True)
    os._exit(0)  # without the pictures


run.Run.compile_jitted = looked_at
script = importlib.import_module(f"algorithms.{sys.argv[1]}")
for chunk in {"fill", "collect", "learn", "remember", "evaluate"} & set(vars(script)):
    setattr(script, chunk, chex.assert_max_traces(getattr(script, chunk), 1))
train, script.train = script.train, only_train
script.main([sys.argv[1], *sys.argv[2:]])
