"""Reports as people see them: terminal, Markdown, page, figures, notebook."""
