{{/* Labels of everything; `name` is the part. */}}
{{- define "outrigger.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: outrigger
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- /* Whoever has the namespace among the manifests does not have Helm. */}}
app.kubernetes.io/managed-by: {{ ternary "outrigger" .root.Release.Service .root.Values.namespace }}
{{- end }}

{{/* What a part's pods are known by. */}}
{{- define "outrigger.selector" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: outrigger
{{- end }}

{{- define "outrigger.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Identities and addresses of the system name its namespace. */}}
{{- define "outrigger.namespace" -}}
{{- if ne .Release.Namespace "outrigger-system" -}}
{{- fail "outrigger lives in the namespace outrigger-system: helm --namespace outrigger-system --create-namespace" -}}
{{- end -}}
outrigger-system
{{- end }}

{{/* Driver and socket by which pods reach another Workload API; empty where there is none. */}}
{{- define "outrigger.workloadApi" -}}
{{- with .Values.workloadApi -}}
{{- if or (hasPrefix "/" .) (hasPrefix "unix:" .) -}}
{{- fail (printf "workloadApi: %s is a path on the node: a pod reaches it by a hostPath volume alone, which Pod Security restricted forbids; name the driver that brings the socket into pods, as csi.spiffe.io" .) -}}
{{- end -}}
{{- if eq (splitList "/" . | first) "csi.outrigger.dev" -}}
{{- fail "workloadApi: csi.outrigger.dev is the node agent's own driver, whose Workload API is asked where nothing is set" -}}
{{- end -}}
{{- contains "/" . | ternary . (printf "%s/spire-agent.sock" .) -}}
{{- end -}}
{{- end }}
