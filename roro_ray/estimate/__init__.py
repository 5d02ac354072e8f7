"""What a run would ask of GPUs, purses and patience, worked out from its settings and the shapes of its models.

Nothing here is measured: every figure follows from formulas that stand in the modules and from assumptions that are
settings (`estimate.*`) and are printed with the result.
"""
