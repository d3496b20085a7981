"""What results look like: the rows of the CSV files, and the tables and figures that documents show of them."""
