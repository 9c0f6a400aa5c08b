use super::*;

#[test]
fn prometheus_reads_counters_before_and_after_the_start() {
    let bench = Bench::new();
    let metrics = || {
        let answer = bench.raw(request("GET", "/metrics", "").as_bytes());
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(
            head.contains("content-type: application/openmetrics-text; version=1.0.0"),
            "{head}"
        );
        assert!(body.ends_with("# EOF\n"), "{body}");
        body.to_owned()
    };
    let before = metrics();
    assert!(
        before.contains("coppice_process_private_bytes "),
        "{before}"
    );
    assert!(!before.contains("coppice_guest_memory_bytes"), "{before}");
    bench.start();
    let after = metrics();
    assert!(
        after.contains("coppice_guest_memory_bytes{state=\"shared\"} 0\n"),
        "{after}"
    );
}
