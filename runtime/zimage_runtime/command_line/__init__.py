"""What both commands share: errors as one line, exit statuses, option types, progress on stderr."""
