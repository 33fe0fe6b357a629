// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"encoding/xml"
	"fmt"
	"strings"
)

// Metadata is what a domain's XML says of the domain for people and for the
// cloud that manages it. All of it may be empty.
type Metadata struct {
	Title       string
	Description string
	Cloud       *Cloud // nil when no cloud that we know of wrote any; not changed once made
}

// Cloud is who a domain is in the system that manages it, as that system wrote
// it into the domain's metadata. What it did not write is empty.
type Cloud struct {
	System       string // "ovirt", "nova", "kubevirt"
	Name         string // the system's name of the guest
	InstanceUUID string // the system's id of it: oVirt's VM, Nova's instance, KubeVirt's VirtualMachineInstance
	Namespace    string // KubeVirt's
	Project      string // Nova's, by name
	ProjectID    string
	User         string // Nova's, by name: who made it
	UserID       string
	Flavor       string // Nova's
}

// Namespaces of the elements in <metadata>. Nova's ends in a version.
const (
	ovirtNS    = "http://ovirt.org/vm/1.0"
	novaNS     = "http://openstack.org/xmlns/libvirt/nova/"
	kubevirtNS = "http://kubevirt.io"
)

// domainXML is the part of a <domain> that we read.
type domainXML struct {
	ID          *int   `xml:"id,attr"`
	Name        string `xml:"name"`
	UUID        string `xml:"uuid"`
	Title       string `xml:"title"`
	Description string `xml:"description"`
	Metadata    struct {
		Elements []elementXML `xml:",any"`
	} `xml:"metadata"`
}

// elementXML is an element of <metadata>: all that one of the clouds writes
// which others do not contradict. Whose it is its namespace tells.
type elementXML struct {
	XMLName xml.Name
	Name    string `xml:"name"`
	UID     string `xml:"uid"`
	Flavor  struct {
		Name string `xml:"name,attr"`
	} `xml:"flavor"`
	User    ownerXML `xml:"owner>user"`
	Project ownerXML `xml:"owner>project"`
}

type ownerXML struct {
	ID   string `xml:"uuid,attr"`
	Name string `xml:",chardata"`
}

// metadata returns what the XML says. The first cloud is taken: a domain has
// one.
func (x *domainXML) metadata() Metadata {
	m := Metadata{Title: strings.TrimSpace(x.Title), Description: strings.TrimSpace(x.Description)}
	for i := range x.Metadata.Elements {
		if m.Cloud = x.cloud(&x.Metadata.Elements[i]); m.Cloud != nil {
			break
		}
	}
	return m
}

// cloud reads one element of the metadata. It returns nil when that is not a
// cloud's.
func (x *domainXML) cloud(e *elementXML) *Cloud {
	trim := strings.TrimSpace
	switch ns, element := e.XMLName.Space, e.XMLName.Local; {
	case ns == ovirtNS && element == "vm":
		// It tells nothing about who this is: the domain's own name and uuid
		// are oVirt's.
		return &Cloud{System: "ovirt", Name: x.Name, InstanceUUID: parseUUID(x.UUID)}
	case strings.HasPrefix(ns, novaNS) && element == "instance":
		return &Cloud{
			System:       "nova",
			Name:         trim(e.Name),
			InstanceUUID: parseUUID(x.UUID),
			Project:      trim(e.Project.Name),
			ProjectID:    trim(e.Project.ID),
			User:         trim(e.User.Name),
			UserID:       trim(e.User.ID),
			Flavor:       trim(e.Flavor.Name),
		}
	case ns == kubevirtNS && element == "kubevirt":
		return kubevirt(x.Name, parseUUID(trim(e.UID)))
	}
	return nil
}

// kubevirt is the cloud of a domain of KubeVirt's, which is called
// <namespace>_<name>: neither of the two may hold a "_".
func kubevirt(domain, uid string) *Cloud {
	c := &Cloud{System: "kubevirt", InstanceUUID: uid}
	if namespace, name, ok := strings.Cut(domain, "_"); ok {
		c.Namespace, c.Name = namespace, name
	}
	return c
}

// ParseMetadata reads a <domain>, as libvirt describes it.
func ParseMetadata(b []byte) (Metadata, error) {
	var x struct {
		XMLName xml.Name `xml:"domain"`
		domainXML
	}
	if err := xml.Unmarshal(b, &x); err != nil {
		return Metadata{}, fmt.Errorf("domain: %w", err)
	}
	return x.metadata(), nil
}
