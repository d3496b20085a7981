"""What is measured of zigzag_ext, how, and what came of it. Not installed: its programs run from the root of a checkout.

    python -m benchmarks.decode --help
    python -m benchmarks.report         # tables and figures of the documents, from results/

Programs: decode, prefill, step, capacity, kv_quality, evidence, solver_table, text_perplexity. Rooms, each importing only those
before it: timing, cells, report and peers; then the programs.
"""
