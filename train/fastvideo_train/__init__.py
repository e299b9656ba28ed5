"""Make video models: recipes, roles, methods, strategies, and the loop that joins them."""
