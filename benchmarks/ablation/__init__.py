"""The method against its parts: every variant of Evo trained alike, on text and on tasks that need a plan."""
