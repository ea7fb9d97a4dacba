"""Ways to use the package inside other people's models."""
