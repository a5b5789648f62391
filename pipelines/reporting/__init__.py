"""What `report` is made of: results, comparisons, verdict, tables, figures, page."""
