"""Layer 6. Certificates, forecasts and solutions of users' models."""
