//! Who has an address, whoever writes it as well.

use super::*;

/// A Service of another namespace that writes these addresses.
fn thief(namespace: &str, addresses: &str) -> String {
    SERVICE
        .replace("namespace: shop", &format!("namespace: {namespace}"))
        .replace("spec: {", &format!("spec: {{ clusterIPs: [{addresses}],"))
}

#[test]
fn a_service_that_writes_the_address_of_another_one_is_refused_with_its_place() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let refused = |namespace: &str, text: &str, place: &str| {
        let answer = api.apply(&texts(text));
        let [problem] = answer.problems.as_slice() else { panic!("{namespace}: {:?}", answer.problems) };
        assert!(problem.refuses && answer.results.is_empty(), "{problem:?}");
        assert_eq!(problem.resource.as_deref(), Some(format!("Service/{namespace}/web").as_str()));
        assert!(problem.text.contains("is the address of Service/shop/web, which had it first"), "{problem:?}");
        assert_eq!(problem.place.as_deref(), Some(place));
    };
    api.apply(&texts(SERVICE));
    // The first by name too: what counts is who had it.
    refused("zevil", &thief("zevil", "\"fd65::3\", 10.65.0.2"), "web.yaml:4:33");
    refused("aevil", &thief("aevil", "\"fd65::2\""), "web.yaml:4:22");
    // Also beside the victim, once more.
    refused("aevil", &format!("{}---\n{SERVICE}", thief("aevil", "\"::ffff:10.65.0.2\"")), "web.yaml:4:22");
    // Of one that writes its own, and from then on beside one that is gone.
    let own = SERVICE.replace("spec: {", "spec: { clusterIP: 10.65.7.7,");
    assert_eq!(actions(&api.apply(&texts(&own))), [("Service/shop/web", "changed")]);
    refused("aevil", &thief("aevil", "10.65.7.7"), "web.yaml:4:22");
    refused("aevil", &thief("aevil", "10.65.0.2"), "web.yaml:4:22");
    api.delete(&texts(SERVICE), Again::default());
    assert_eq!(actions(&api.apply(&texts(&thief("aevil", "10.65.7.7")))), [("Service/aevil/web", "created")]);
    // Two at once: what is written is given to nobody else, and of two that write one the first by name has it.
    let both = format!("{}---\n{}", thief("a", "10.65.8.8"), thief("b", "10.65.8.8"));
    let answer = api.apply(&texts(&both));
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert_eq!((problem.resource.as_deref(), problem.refuses), (Some("Service/b/web"), true));
    let twice = api.apply(&texts(&thief("c", "10.65.9.9, \"::ffff:10.65.9.9\"")));
    assert!(twice.problems[0].text.contains("is there already"), "{:?}", twice.problems);
}

#[test]
fn a_service_takes_no_address_of_a_pod_or_of_a_host_outside_of_the_mesh() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let pod = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: srv, namespace: shop }\nspec: { addresses: [10.64.0.2, \"fd64::2\"] }\n";
    let pod = yaml::read(pod).remove(0).unwrap().resource;
    let (key, origin) = (pod.key(), Origin::Pod("pods/shop.srv.json".into()));
    api.store.apply(vec![Change::Put { key: key.clone(), form: Form::Read(Arc::new(pod)), origin: origin.clone() }]);
    let attack = |address: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: aab, namespace: attack }}\nspec: {{ clusterIP: \"{address}\", selector: {{ app: bad }}, ports: [{{ port: 8080 }}] }}\n"
        )
    };
    for (address, why) in [
        ("10.64.0.2", "is the address of Workload/shop/srv"),
        ("::ffff:10.64.0.2", "is the address of Workload/shop/srv"),
        ("fd64::2", "is the address of Workload/shop/srv"),
        ("8.8.8.8", "is outside of the mesh's ranges"),
    ] {
        let answer = api.apply(&texts(&attack(address)));
        let [problem] = answer.problems.as_slice() else { panic!("{address}: {:?}", answer.problems) };
        assert!(problem.refuses && problem.text.contains(why) && !problem.remedy.is_empty(), "{problem:?}");
        assert_eq!(problem.place.as_deref(), Some("web.yaml:4:9"));
        // In a folder it is told, and leads nobody away.
        let path = state.path().join("mesh.yaml");
        in_folder(&api, &path, &attack(address).replace("aab", "aac"));
        let told = api.store.problems();
        assert!(told.iter().any(|wrong| wrong.problem.text.contains(why)), "{told:?}");
        let world = api.store.world();
        let body = world.body(&"Service/attack/aac".parse().unwrap()).unwrap().json.to_string();
        assert!(!body.contains(address), "{body}");
        let scope = crate::delta::Scope::Address(address.parse().unwrap());
        let seen = select(&world, &"shop/client".parse().unwrap(), &scope);
        let expected: Vec<&ResourceKey> = if address == "8.8.8.8" { Vec::new() } else { vec![&key] };
        assert_eq!(seen.keys.iter().collect::<Vec<_>>(), expected);
        assert_eq!(seen.absent, address == "8.8.8.8");
    }
    // One that a Mesh names, and no pod has, is the Service's; it gives way once a pod comes.
    let mesh = "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: { name: mesh }\nspec: { ranges: [10.0.0.0/8] }\n---\n";
    api.store.apply(vec![Change::Remove { key: key.clone(), origin }]);
    let path = state.path().join("mesh.yaml");
    let leads = || api.store.world().body(&"Service/attack/aac".parse().unwrap()).unwrap().json.contains("10.96.0.1");
    in_folder(&api, &path, &attack("10.96.0.1").replace("aab", "aac"));
    assert!(!leads());
    in_folder(&api, &path, &format!("{mesh}{}", attack("10.96.0.1").replace("aab", "aac")));
    assert!(leads() && api.store.problems().is_empty(), "{:?}", api.store.problems());
    let late = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: late, namespace: shop }\nspec: { addresses: [10.96.0.1] }\n";
    let late = yaml::read(late).remove(0).unwrap().resource;
    let form = Form::Read(Arc::new(late));
    let (late, origin) = ("Workload/shop/late".parse().unwrap(), Origin::Pod("pods/shop.late.json".into()));
    api.store.apply(vec![Change::Put { key: late, form, origin }]);
    assert!(!leads());
}

#[test]
fn a_workload_takes_no_address_that_a_service_was_given() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    api.apply(&texts(SERVICE));
    let thief = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: thief, namespace: attack }\nspec: { addresses: [10.65.0.2] }\n";
    let answer = api.apply(&texts(thief));
    assert!(answer.problems.iter().any(|problem| problem.refuses && problem.text.contains("Service/shop/web")));
    in_folder(&api, &state.path().join("mesh.yaml"), thief);
    assert!(api.store.world().body(&"Service/shop/web".parse().unwrap()).unwrap().json.contains("10.65.0.2"));
}

#[test]
fn the_record_of_a_running_pod_counts_before_every_document_of_its_name() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let claim = |address: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: web, namespace: shop }}\nspec: {{ addresses: [{address}] }}\n"
        )
    };
    let key: ResourceKey = "Workload/shop/web".parse().unwrap();
    let in_force = |address: &str| api.store.world().body(&key).unwrap().json.contains(address);
    // A document that is there before the pod gives way to it.
    assert_eq!(actions(&api.apply(&texts(&claim("10.64.0.9")))), [("Workload/shop/web", "created")]);
    let record = yaml::read(&claim("10.64.0.2")).remove(0).unwrap().resource;
    let origin = Origin::Pod("pods/shop.web.json".into());
    api.store.apply(vec![Change::Put { key: key.clone(), form: Form::Read(Arc::new(record)), origin: origin.clone() }]);
    assert!(in_force("10.64.0.2"));
    let path = state.path().join("mesh.yaml");
    in_folder(&api, &path, &claim("10.64.0.8"));
    assert!(in_force("10.64.0.2"));
    assert_eq!(api.sidecars().1, [NotConnected { namespace: "shop".to_owned(), name: "web".to_owned() }]);
    let told: Vec<_> = api.store.problems().iter().cloned().collect();
    let places: Vec<_> = told.iter().filter_map(|wrong| wrong.place.as_deref()).collect();
    let stored = api.stored(&key);
    assert_eq!(places, [format!("{}:1:1", path.display()), format!("{}:1:1", stored.display())]);
    for wrong in &told {
        assert!(wrong.problem.text.starts_with("the pod shop/web is running here"), "{wrong:?}");
        assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.remedy == "choose another name", "{wrong:?}");
    }
    let answer = api.apply(&texts(&claim("10.64.0.7")));
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert!(problem.refuses && problem.text.starts_with("the pod shop/web is running here"), "{problem:?}");
    assert!(answer.results.is_empty() && in_force("10.64.0.2"));
    // It goes, and the documents are what there is.
    api.store.apply(vec![Change::Remove { key: key.clone(), origin }]);
    assert!(in_force("10.64.0.9"));
}

#[test]
fn nobody_takes_an_address_from_a_pod_that_runs_or_a_policy_off_it() {
    let workload = |name: &str, spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}, namespace: shop, labels: {{ app: {name} }} }}\nspec: {{ serviceAccount: {name}, {spec} }}\n"
        )
    };
    let [thief, pod] = [
        workload("a-thief", "transport: Plaintext, addresses: [10.64.9.9, 10.64.0.5]"),
        workload("web-1", "addresses: [10.64.0.5, \"fd64::5\"]"),
    ];
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Workload, name: web-1 }], action: DENY, rules: [{}] }\n";
    let key: ResourceKey = "Workload/shop/web-1".parse().unwrap();
    let thiefs: ResourceKey = "Workload/shop/a-thief".parse().unwrap();
    let record = Origin::Pod("pods/shop.web-1.json".into());
    // Whoever comes first, the pod or the document.
    for pod_first in [true, false] {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let path = state.path().join("mesh.yaml");
        let start = || {
            let form = Form::Read(Arc::new(yaml::read(&pod).remove(0).unwrap().resource));
            api.store.apply(vec![Change::Put { key: key.clone(), form, origin: record.clone() }]);
        };
        let seen = |scope: &str| {
            let world = api.store.world();
            let keys = select(&world, &"shop/client".parse().unwrap(), &scope.parse().unwrap()).keys;
            let mut resources = Resources::default();
            for key in keys {
                let resource = Resource::from_json(key.kind, world.body(&key).unwrap().json.as_bytes()).unwrap();
                compile::admit(&mut resources, key, Ok(Arc::new(resource)));
            }
            resources
        };
        let compiled = |scope: &str, own: &str| {
            let own = compile::Own { workload: own.parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() };
            compile::compile(&seen(scope), &own, &crate::snapshot::Snapshot::empty()).0
        };
        api.apply(&texts(gate));
        if pod_first {
            start();
        }
        in_folder(&api, &path, &thief);
        start();
        for address in ["10.64.0.5", "fd64::5"] {
            let snapshot = compiled(&format!("address/{address}"), "shop/client");
            let endpoint = &snapshot.outbound.workloads[&address.parse().unwrap()];
            let identity = "spiffe://cluster.local/ns/shop/sa/web-1".parse().unwrap();
            assert_eq!(endpoint.transport, crate::snapshot::Transport::MutualTls(identity), "{address}");
        }
        // Its other address is not the document's either, nobody is led to it by a name, and it gets no stream.
        assert!(!seen("address/10.64.9.9").by_key.contains_key(&thiefs));
        assert!(api.store.world().resources().workload(&thiefs.name).is_none());
        let own = seen("workload/shop/web-1");
        assert!(own.by_key.contains_key(&"AuthorizationPolicy/shop/gate".parse().unwrap()) && own.by_key.contains_key(&key));
        let told = api.store.problems();
        let [wrong] = &*told else { panic!("{told:?}") };
        assert_eq!(wrong.place, Some(format!("{}:4:79", path.display())));
        assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.resource == thiefs.to_string(), "{wrong:?}");
        assert!(wrong.problem.text.contains("is the address of Workload/shop/web-1, a pod that runs here"), "{wrong:?}");
        // Applied, it is refused at once.
        let answer = api.apply(&texts(&thief.replace("a-thief", "b-thief")));
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(problem.refuses && problem.place.as_deref() == Some("web.yaml:4:79") && answer.results.is_empty());
        // The pod goes, and the document is what there is.
        api.store.apply(vec![Change::Remove { key: key.clone(), origin: record.clone() }]);
        assert!(api.store.world().resources().workload(&thiefs.name).is_some());
        assert!(api.store.problems().iter().all(|wrong| wrong.problem.severity == Severity::Warns));
    }
}

#[test]
fn a_service_leads_no_calls_away_from_the_address_of_another_one() {
    let victim = "apiVersion: v1\nkind: Service\nmetadata: { name: db, namespace: shop }\nspec: { selector: { app: db }, ports: [{ port: 80 }] }\n";
    let thief = "apiVersion: v1\nkind: Service\nmetadata: { name: bad, namespace: NAMESPACE }\nspec: { clusterIPs: [\"fd65::2\", 10.65.0.2], selector: { app: bad }, ports: [{ port: 80 }] }\n";
    let gate = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: NAMESPACE }\nspec: { targetRefs: [{ kind: Service, name: bad }], action: DENY, rules: [{}] }\n";
    let pod = |namespace: &str, name: &str, host: u8| {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}-1, namespace: {namespace}, labels: {{ app: {name} }} }}\nspec: {{ addresses: [10.64.0.{host}], serviceAccount: {name} }}\n"
        )
    };
    let told = |api: &Api, address: &str| {
        let world = api.store.world();
        let scope = crate::delta::Scope::Address(address.parse().unwrap());
        let mut resources = Resources::default();
        for key in select(&world, &"shop/client".parse().unwrap(), &scope).keys {
            let resource = Resource::from_json(key.kind, world.body(&key).unwrap().json.as_bytes()).unwrap();
            compile::admit(&mut resources, key, Ok(Arc::new(resource)));
        }
        let own = compile::Own { workload: "shop/client".parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() };
        let snapshot = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty()).0;
        let port = &snapshot.outbound.services[&std::net::SocketAddr::new(address.parse().unwrap(), 80)];
        port.default_backend.endpoints.iter().map(|endpoint| endpoint.workload.to_string()).collect::<Vec<_>>()
    };
    for namespace in ["aevil", "zevil"] {
        for written in [false, true] {
            let state = tempfile::tempdir().unwrap();
            let first = api(state.path());
            // Written, it is the Service's own from the first word on; else it was given.
            let victim = if written { victim.replace("spec: {", "spec: { clusterIP: 10.65.0.2,") } else { victim.to_owned() };
            let victim = format!("{victim}{}", pod("shop", "db", 2));
            let thief = format!("{thief}{gate}").replace("NAMESPACE", namespace) + &pod(namespace, "bad", 3);
            let [db, bad] = ["db.yaml", "bad.yaml"].map(|name| state.path().join(name));
            let addresses: &[&str] = if written { &["10.65.0.2"] } else { &["10.65.0.2", "fd65::2"] };
            in_folder(&first, &db, &victim);
            in_folder(&first, &bad, &thief);
            let check = |api: &Api, when: &str| {
                for address in addresses {
                    assert_eq!(told(api, address), ["shop/db-1"], "{namespace} {written} {when}");
                }
                let problems = api.store.problems();
                let refused: Vec<_> = problems.iter().filter(|told| told.problem.severity == Severity::Refuses).collect();
                let [refused] = refused.as_slice() else { panic!("{problems:?}") };
                assert_eq!(refused.problem.resource, format!("Service/{namespace}/bad"), "{when}");
                assert!(refused.place.as_deref().unwrap().ends_with("bad.yaml:4:33"), "{refused:?}");
                // What its policy covers is covered all the same.
                let world = api.store.world();
                let pod = format!("{namespace}/bad-1");
                let scope = format!("workload/{pod}").parse().unwrap();
                let seen = select(&world, &pod.parse().unwrap(), &scope).keys;
                assert!(seen.contains(&format!("AuthorizationPolicy/{namespace}/gate").parse().unwrap()));
                assert!(seen.contains(&format!("Service/{namespace}/bad").parse().unwrap()));
            };
            check(&first, "at once");
            in_folder(&first, &bad, &thief.replace("port: 80", "port: 80, name: http"));
            in_folder(&first, &db, &victim.replace("port: 80", "port: 80, name: http"));
            // After a restart, whoever is read first.
            for thief_first in [true, false] {
                let again = api(state.path());
                let mut both = [(&db, &victim), (&bad, &thief)];
                if thief_first {
                    both.reverse();
                }
                for (path, text) in both {
                    in_folder(&again, path, text);
                }
                again.store.forget_gone();
                check(&again, "after a restart");
            }
            // Whose Service is gone at the restart lets go of what it wrote; what was given is kept for it.
            let last = api(state.path());
            in_folder(&last, &bad, &thief);
            assert_eq!(last.store.problems().len(), 1);
            last.store.forget_gone();
            assert_eq!(last.store.problems().len(), usize::from(!written), "{:?}", last.store.problems());
            if written {
                assert_eq!(told(&last, "10.65.0.2"), [format!("{namespace}/bad-1")]);
            }
        }
    }
}

#[tokio::test]
async fn a_service_whose_address_is_another_ones_is_shown_as_not_in_force_with_the_reason() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    api.apply(&texts(SERVICE));
    in_folder(&api, &state.path().join("thief.yaml"), &thief("zevil", "10.65.0.2"));
    let shown = |namespace: &str| {
        let which = Which { kind: Some("service".to_owned()), namespace: Some(namespace.to_owned()), name: None };
        let api = Arc::clone(&api);
        async move {
            let body = axum::body::to_bytes(resources(State(api), Query(which)).await.into_body(), 1 << 20).await.unwrap();
            serde_json::from_slice::<Value>(&body).unwrap()["items"][0]["status"].clone()
        }
    };
    let status = shown("zevil").await;
    assert_eq!((&status["inForce"], &status["accepted"]), (&json!(false), &json!(false)), "{status}");
    assert_eq!(status["addressTakenBy"], "Service/shop/web");
    let reason = status["problems"][0]["text"].as_str().unwrap();
    assert!(reason.starts_with("10.65.0.2 is the address of Service/shop/web, which had it first"), "{status}");
    let status = shown("shop").await;
    assert!(status["inForce"] == true && status["addressTakenBy"].is_null(), "{status}");
}

#[test]
fn of_two_documents_with_one_address_the_one_that_is_applied_later_is_refused() {
    let workload = |name: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name} }}\nspec: {{ addresses: [10.64.99.5] }}\n"
        )
    };
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    assert!(api.apply(&texts(&workload("m"))).problems.is_empty());
    // By its name the first would count; what is applied takes nothing away all the same.
    for name in ["a", "z"] {
        let answer = api.apply(&texts(&workload(name)));
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(problem.refuses && problem.text.contains("10.64.99.5 is the address of Workload/default/"), "{problem:?}");
        assert!(api.store.world().resources().workload(&"default/m".parse().unwrap()).is_some());
    }
}
