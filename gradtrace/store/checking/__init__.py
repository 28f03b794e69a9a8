"""Whether a store is whole, and how it is made so again."""
