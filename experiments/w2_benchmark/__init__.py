"""Flows on pairs whose optimal transport is known, in many dimensions: the Mix3ToMix10 benchmark."""
