// Tells the kubelet of a CSI driver, as the node-driver-registrar of Kubernetes' CSI project does.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

type introduction struct {
	registration.UnimplementedRegistrationServer
	name, endpoint string
}

func (i introduction) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              i.name,
		Endpoint:          i.endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (i introduction) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	log.Printf("registered: %v %s", status.PluginRegistered, status.Error)
	return &registration.RegistrationStatusResponse{}, nil
}

func main() {
	name := flag.String("name", "csi.spiffe.io", "the driver's name")
	endpoint := flag.String("endpoint", "", "the driver's socket")
	registry := flag.String("registry", "", "the kubelet's folder plugins_registry")
	flag.Parse()
	socket := filepath.Join(*registry, *name+"-reg.sock")
	_ = os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, introduction{name: *name, endpoint: *endpoint})
	log.Fatal(server.Serve(listener))
}
