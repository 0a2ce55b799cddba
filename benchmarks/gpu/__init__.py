"""The operators on a GPU beside their peers: `python -m benchmarks.gpu OPERATOR --out FOLDER`.

`--device cpu --tiny` goes through the same code with small tensors: a test of the benchmarks, not a measurement.
"""
