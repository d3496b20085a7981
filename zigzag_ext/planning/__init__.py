"""Which layers retrieve and which stream: plans, head scores, costs, the solver. Needs numpy only."""
