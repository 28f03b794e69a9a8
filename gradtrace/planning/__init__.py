"""What tracing will take, before it is done: `gradtrace.plan`."""
