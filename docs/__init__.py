"""The documentation: pages, and what makes a site of them (`make docs`). Not installed."""
