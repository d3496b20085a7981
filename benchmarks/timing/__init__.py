"""How time and memory are measured, and the names that go with every number."""
