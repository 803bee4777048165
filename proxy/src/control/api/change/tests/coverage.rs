//! What a security policy goes on covering when its Service changes, and what is said of it.

use super::*;

#[test]
fn a_security_policy_that_loses_its_service_is_told_of() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
    let pod = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.9] }\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    let answer = api.apply(&texts(&(service.clone() + policy + pod)));
    assert!(answer.problems.is_empty(), "{:?}", answer.problems);
    let answer = api.delete(&texts(&service), Again::default());
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
    assert!(problem.text.contains("goes on covering what it led to, and nothing else; it was for shop/web-1"), "{problem:?}");
    // Both at once leave nothing behind.
    api.apply(&texts(&service));
    assert!(api.delete(&texts(&(service + policy)), Again::default()).problems.is_empty());
}

#[test]
fn who_changes_a_service_does_not_take_its_policy_off_the_pods() {
    let state = tempfile::tempdir().unwrap();
    let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    let decides = |api: &Api, port: u16| {
        // What the pod's sidecar is sent, and what it makes of it.
        let pod = "shop/web-1".parse().unwrap();
        let world = api.store.world();
        let mut resources = Resources::default();
        for key in select(&world, &pod, &"workload/shop/web-1".parse().unwrap()).keys {
            let body = world.body(&key).unwrap();
            let resource = Resource::from_json(key.kind, body.json.as_bytes()).unwrap();
            assert!(!compile::admit(&mut resources, key, Ok(Arc::new(resource))).refused());
        }
        let own = compile::Own { workload: pod, trust_domain: "cluster.local".parse().unwrap() };
        let (snapshot, _) = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty());
        let identity = "spiffe://cluster.local/ns/shop/sa/any".parse().unwrap();
        let peer = crate::policy::Peer { identity: Some(identity), address: "10.64.0.3:1".parse().unwrap(), port };
        format!("{:?}", snapshot.inbound.port(port).policies.authorization.as_ref().unwrap().decide_opaque(&peer))
    };
    let denied = |api: &Api, port| {
        let verdict = decides(api, port);
        assert!(verdict.contains("AuthorizationPolicy/shop/gate"), "{port}: {verdict}");
    };
    {
        let api = api(state.path());
        let answer = api.apply(&texts(&(service.clone() + policy + POD)));
        assert!(answer.problems.is_empty(), "{:?}", answer.problems);
        denied(&api, 80);
        // Another port, and the policy beside it as it was.
        let answer = api.apply(&texts(&(service.replace("port: 80", "port: 80, targetPort: 81") + policy)));
        denied(&api, 80);
        denied(&api, 81);
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
        let text = "the policy goes on covering port 80 of shop/web-1: Service/shop/web led there, and leads there no longer";
        assert_eq!(problem.text, text);
        // Other pods.
        let answer = api.apply(&texts(&service.replace("app: web", "app: nobody")));
        assert!(
            answer.problems.iter().any(|problem| problem.text.contains("ports 80, 81 of shop/web-1")),
            "{:?}",
            answer.problems
        );
        denied(&api, 80);
        denied(&api, 81);
    }
    {
        // While nobody looks, and without the Service.
        let api = api(state.path());
        let stored = yaml::read(&(policy.to_owned() + POD)).into_iter().map(|document| document.unwrap().resource);
        let put = |resource: Resource| {
            let origin = Origin::Applied(api.stored(&resource.key()));
            Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin }
        };
        api.store.apply(stored.map(put).collect());
        api.store.forget_gone();
        denied(&api, 80);
        denied(&api, 81);
        let told = compile::without_target(api.store.world().resources());
        assert!(told.values().all(|means| means.contains("goes on covering")) && told.len() == 1, "{told:?}");
        // Who may change the policy lets go, and is told of what.
        let answer = api.apply(&texts(&policy.replace("name: gate,", "name: gate, annotations: { reviewed: today },")));
        let said = |text: &str| answer.problems.iter().any(|problem| problem.text.contains(text));
        assert!(said("lets go of ports 80, 81 of shop/web-1"), "{:?}", answer.problems);
        assert!(decides(&api, 80).contains("default_allow"));
    }
}

#[test]
fn a_policys_file_that_is_renamed_or_written_anew_takes_nothing_off() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n";
    let service = |app: &str| SERVICE.replace("spec: {", &format!("spec: {{ selector: {{ app: {app} }},"));
    let key: ResourceKey = "AuthorizationPolicy/shop/gate".parse().unwrap();
    let [path, renamed] = ["pol.yaml", "pol2.yaml"].map(|name| state.path().join(name));
    let covers = || api.store.world().body(&key).unwrap().json.contains(r#""app":"web""#);
    let gone = |path: &Path| {
        api.store.apply(vec![Change::Remove { key: key.clone(), origin: Origin::File(path.to_owned()) }]);
    };
    api.apply(&texts(&service("web")));
    in_folder(&api, &path, gate);
    api.apply(&texts(&service("nobody")));
    assert!(covers());
    gone(&path);
    assert!(api.store.world().body(&key).is_none());
    in_folder(&api, &renamed, gate);
    assert!(covers());
    // Who deletes it by name means it.
    gone(&renamed);
    api.apply(&texts(gate));
    assert!(covers());
    api.delete(&texts(gate), Again::default());
    api.apply(&texts(gate));
    assert!(!covers());
}

#[test]
fn where_what_policies_covered_cannot_be_read_they_cover_all_that_they_may_have_covered() {
    let state = tempfile::tempdir().unwrap();
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n";
    let pod = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.5] }\n";
    let service = |app: &str| SERVICE.replace("spec: {", &format!("spec: {{ selector: {{ app: {app} }},"));
    let first = api(state.path());
    for text in [gate, pod, &service("web"), &service("nobody")] {
        assert!(!first.apply(&texts(text)).problems.iter().any(|problem| problem.refuses));
    }
    drop(first);
    let covered = state.path().join("covered.json");
    // The next life reads what is stored, and takes it for all there is.
    let next = || {
        let api = api(state.path());
        let documents = [gate.to_owned(), pod.to_owned(), service("nobody")];
        let stored = documents.iter().map(|text| {
            let resource = yaml::read(text).remove(0).unwrap().resource;
            let (key, form) = (resource.key(), Form::Read(Arc::new(resource)));
            Change::Put { origin: Origin::Applied(api.stored(&key)), key, form }
        });
        api.store.apply(stored.collect());
        api.store.forget_gone();
        api
    };
    let refuses = |api: &Api, port: u16| {
        let world = api.store.world();
        let keys = select(&world, &"shop/web-1".parse().unwrap(), &"workload/shop/web-1".parse().unwrap()).keys;
        let mut resources = Resources::default();
        for key in keys {
            let resource = Resource::from_json(key.kind, world.body(&key).unwrap().json.as_bytes()).unwrap();
            compile::admit(&mut resources, key, Ok(Arc::new(resource)));
        }
        let own = compile::Own { workload: "shop/web-1".parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() };
        let (snapshot, _) = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty());
        let rules = format!("{:?}", snapshot.inbound.port(port).policies.authorization);
        rules.contains("AuthorizationPolicy/shop/gate")
    };
    let wide = |api: &Api| api.store.world().coverage().wide().count();
    let known = next();
    assert_eq!((refuses(&known, 80), refuses(&known, 81), wide(&known)), (true, false, 0));
    for garbage in ["", "{\"AuthorizationPolicy/shop/gate\":{\"policy\":\"x\",\"forms\":[{\"service\":\"we"] {
        std::fs::write(&covered, garbage).unwrap();
        let lost = next();
        assert_eq!((refuses(&lost, 80), refuses(&lost, 81), wide(&lost)), (true, true, 1));
        assert!(lost.store.problems().iter().any(|wrong| wrong.problem.text.contains("is not known any more")));
        assert_eq!(std::fs::read_to_string(state.path().join("covered.json.unreadable")).unwrap(), garbage);
        // It is remembered that nothing is known, until the policy is changed.
        let again = next();
        assert_eq!((refuses(&again, 81), wide(&again)), (true, 1));
    }
    let api = next();
    let answer = api.apply(&texts(&gate.replace("name: gate,", "name: gate, annotations: { reviewed: today },")));
    assert!(
        answer.problems.iter().any(|problem| problem.text.contains("lets go of every port of shop/web-1")),
        "{:?}",
        answer.problems
    );
    assert_eq!((refuses(&api, 80), wide(&api)), (false, 0));
}

#[test]
fn a_service_that_led_to_more_than_can_be_remembered_is_told_of() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n";
    api.apply(&texts(gate));
    let service = |n: usize| SERVICE.replace("spec: {", &format!("spec: {{ selector: {{ release: r{n} }},"));
    let told = |n: usize| api.apply(&texts(&service(n))).problems.iter().any(|problem| problem.text.contains("led to more"));
    assert_eq!((0..257).map(told).position(|told| told), Some(256));
    assert!(api.store.problems().iter().any(|wrong| wrong.problem.text.contains("led to more")));
}

#[test]
fn what_a_policy_covered_is_not_told_as_known_where_the_memory_of_it_is_lost() {
    let state = tempfile::tempdir().unwrap();
    std::fs::write(state.path().join("covered.json"), "{").unwrap();
    let api = api(state.path());
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n---\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    in_folder(&api, &state.path().join("shop.yaml"), &format!("{policy}{service}{POD}"));
    api.store.forget_gone();
    let texts: Vec<String> = api.store.problems().iter().map(|wrong| wrong.problem.text.clone()).collect();
    let told = "the policy goes on covering every port of shop/web-1: Service/shop/web may have led there";
    assert!(texts.iter().any(|text| text == told), "{texts:?}");
    assert!(texts.iter().all(|text| !text.contains(" led there, and")), "{texts:?}");
    // Who lets go of it is told no more than is known.
    let changed = policy.replace("name: gate,", "name: gate, annotations: { reviewed: today },");
    let mut candidate = api.store.world().clone();
    let resource = yaml::read(&changed).remove(0).unwrap().resource;
    let origin = Origin::File(state.path().join("shop.yaml"));
    let key = resource.key();
    candidate.apply(Change::Put { key: key.clone(), form: Form::Read(Arc::new(resource)), origin });
    let [(_, forms)] = candidate.coverage_mut().released().try_into().unwrap();
    let beyond = kept::beyond(candidate.resources(), candidate.resources().get(&key).unwrap(), &forms);
    assert_eq!(
        beyond.iter().map(let_go).collect::<Vec<_>>(),
        ["every port of shop/web-1, to which Service/shop/web may have led before"]
    );
}
