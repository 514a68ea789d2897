"""The results of a sweep: records, Pareto front and budgets, selection, costs, tables, plots and the HTML page."""
