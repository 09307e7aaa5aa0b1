"""Tests of chunkcache.tree; a package so that its helpers are imported relatively."""
