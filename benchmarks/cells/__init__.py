"""What is measured: shapes, their tensors and oracles, models of random weights, faked contexts, plans."""
