"""The service over HTTP. Only app.py imports the web framework."""
