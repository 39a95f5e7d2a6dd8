"""The mathematics of a step, its types and its checks. Imports no other room of the package."""
