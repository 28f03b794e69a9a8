"""What tracing costs, as ratios to the same step untraced. Run by hand; nothing here is a test."""
