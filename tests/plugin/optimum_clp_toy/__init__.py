"""A package that adds one of each kind to optimum-clp, for the test of its doors."""
