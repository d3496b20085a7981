"""What is measured of zigzag_ext, how, and what came of it. Not installed: run from the root of a checkout,

python -m benchmarks.run --help
"""
