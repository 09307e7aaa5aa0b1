"""Requests as they came: read, recorded, and made of chat logs."""
