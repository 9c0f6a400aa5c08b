//! Hardware-reduced ACPI tables.
