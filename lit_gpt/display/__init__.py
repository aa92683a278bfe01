"""What people look at: tables, figures, spans of time."""
