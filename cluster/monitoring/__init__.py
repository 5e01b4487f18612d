"""What watches a cluster: dashboards of Grafana, scraping and alerts of Prometheus, all made from the definitions."""
