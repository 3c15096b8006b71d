"""Generation against its rivals, on trained weights: how fast, how good, and where the time goes.

    python -m benchmarks.generate

trains a model and a judge first, unless they are there. In turn in one process, against our own autoregressive decoding: `generate` of
transformers on the exported weights, plain diffusion, block diffusion, learned levels, parallel sketches, speculation. Aimed at: some
setting at least twice as fast as autoregression with a quality within 2 % of its.
"""
